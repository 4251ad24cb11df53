"""Nearest training images: against brute force, and copies are found."""

import pytest
import torch
from PIL import Image

from ddpm_pipe.data import neighbours
from ddpm_pipe.data.memory import ImageData
from ddpm_pipe.data.neighbours import nearest, neighbour_grid, without_copies


def pixels(count: int, channels: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, channels, 5, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


def data_of(images: torch.Tensor) -> ImageData:
    return ImageData(images, torch.arange(len(images)))


@pytest.mark.parametrize("block", [1, 7, 50, 4096])
def test_neighbours_are_those_of_brute_force(monkeypatch, block):
    monkeypatch.setattr(neighbours, "PIXELS", block * 3 * 5 * 4)
    images, training = pixels(6), pixels(50, seed=1)
    distances, positions = nearest(images, data_of(training), 3)
    differences = images[:, None].double() - training[None].double()
    expected = differences.pow(2).flatten(2).mean(2).sqrt().sort(dim=1)
    torch.testing.assert_close(distances, expected.values[:, :3], rtol=1e-9, atol=1e-6)
    assert torch.equal(positions, expected.indices[:, :3])


def test_a_copy_has_distance_zero_and_shows_its_original():
    training = pixels(20, channels=1)
    copies = training[[13, 4]]
    distances, positions = nearest(copies, data_of(training), 1)
    assert positions.flatten().tolist() == [13, 4]
    torch.testing.assert_close(distances, torch.zeros(2, 1, dtype=torch.float64), rtol=0, atol=1e-3)
    grid = neighbour_grid(copies, data_of(training), positions)
    originals = Image.fromarray(training[13, 0].numpy()).convert("RGB").tobytes()
    assert grid.size == (2 * 4, 2 * 5)
    assert grid.crop((0, 0, 4, 5)).tobytes() == grid.crop((4, 0, 8, 5)).tobytes() == originals


def test_copies_are_left_out_to_the_bit(monkeypatch):
    monkeypatch.setattr(neighbours, "PIXELS", 7 * 3 * 5 * 4)
    training, images = pixels(20), pixels(24, seed=1)
    images[[0, 9, 23]] = training[[2, 2, 19]]
    kept = without_copies(data_of(images), data_of(training))
    assert kept.rows.tolist() == [i for i in range(24) if i not in (0, 9, 23)]
    images[9, 0, 0, 0] ^= 1
    part = ImageData(images, torch.tensor([23, 9, 5]), labels=torch.arange(24))
    assert without_copies(part, data_of(training)).take(torch.arange(2))[1].tolist() == [9, 5]
    assert len(without_copies(data_of(training), data_of(training))) == 0


def test_rows_of_a_held_out_part_are_not_looked_at():
    training = pixels(20)
    part = ImageData(training, torch.tensor([3, 5, 8]))
    _, positions = nearest(training[[8]], part, 3)
    assert positions[0, 0] == 2 and set(positions[0].tolist()) == {0, 1, 2}


@pytest.mark.parametrize(("images", "count"), [(pixels(2, channels=1), 1), (pixels(2), 21), (pixels(2), 0)])
def test_what_has_no_neighbours_is_refused(images, count):
    with pytest.raises(ValueError, match=rf"have no {count} neighbours among 20"):
        nearest(images, data_of(pixels(20)), count)
