"""A GPU for machines that have none: it computes on the CPU, but says that it is cuda:0 and keeps the rules of a GPU.

A tensor is on the device where its storage was made there. Two modes of torch see every call and every kernel:

- A call that names the device makes a tensor there or copies it there, and `tensor.device` says so.
- A kernel that is given tensors of both devices raises an error. As on a GPU, a 0-d tensor of the CPU may take part in
  pointwise arithmetic, and indices may come from the CPU.
- A generator must be on the device where it draws.
- Kernels that have no deterministic algorithm on CUDA raise an error where one is asked for.
- Each wait of the host for the device is noted with its file and line: numbers that are read, results whose size
  depends on numbers, and copies in either direction. A copy with `non_blocking` does not wait where the memory of the
  CPU is pinned, nor where at most 64 KiB go to the device (CUDA C++ Programming Guide, "Asynchronous Concurrent
  Execution"). A copy that also converts or rearranges goes through memory that is not pinned.

It finds neither a copy that is read before it has arrived nor a wait within a kernel, as those of torch.linalg have.
"""

import linecache
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import ddpm_pipe

aten, Tag = torch.ops.aten, torch.Tag

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
PACKAGE, TORCH = (str(Path(module.__file__).parent) for module in (ddpm_pipe, torch))
SMALL = 64 * 2**10
"""Bytes up to which a copy from memory that is not pinned does not wait."""

INDEXING = {aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten.index_put_.default}
NOT_DETERMINISTIC = {aten.multinomial.default, aten.cumsum.default, aten.histc.default, aten.median.dim}
"""Kernels that CUDA refuses where algorithms must be deterministic (torch.use_deterministic_algorithms), of those that
this package might call; that of multinomial sums up probabilities."""
FROM_DATA = {torch.tensor, torch.as_tensor, torch.asarray}
NAMES_ONLY = {torch.device, torch._C._nn._parse_to}
"""Calls that name a device and make no tensor."""


def canonical(device: str | torch.device) -> torch.device:
    """Return the device, with its index where it is the emulated one."""
    return CUDA if torch.device(device).type == "cuda" else torch.device(device)


def leaves(tree: Any) -> Iterator[Any]:
    """Yield what is in lists, tuples and dicts."""
    if isinstance(tree, (list, tuple, dict)):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from leaves(branch)
    else:
        yield tree


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in leaves(tree) if isinstance(leaf, Tensor)]


class Generator(torch.Generator):
    """A generator that says which device it is on; it draws the same numbers on both."""

    def __new__(cls, device: str | torch.device = "cpu"):
        return super().__new__(cls, "cpu")

    def __init__(self, device: str | torch.device = "cpu"):
        self._device = canonical(device)

    @property
    def device(self) -> torch.device:
        return self._device


class EmulatedDevice:
    """Knows where tensors are, and each wait of the host for the device."""

    def __init__(self):
        self._places: dict[int, tuple[StorageWeakRef, str]] = {}
        self.noted: list[str] = []

    def place(self, tensor: Tensor) -> str:
        """Return "cuda", "pinned" or "cpu"."""
        kept = self._places.get(tensor.untyped_storage()._cdata)
        return kept[1] if kept else "cpu"

    def device(self, tensor: Tensor) -> torch.device:
        return CUDA if self.place(tensor) == "cuda" else CPU

    def put(self, tree: Any, place: str) -> Any:
        """Note that the tensors in `tree` are at a place."""
        if len(self._places) > 20_000:
            self._places = {key: kept for key, kept in self._places.items() if not kept[0].expired()}
        for tensor in tensors_in(tree):
            storage = tensor.untyped_storage()
            self._places[storage._cdata] = StorageWeakRef(storage), place  # which keeps its address from being reused
        return tree

    def note(self, reason: str) -> None:
        """Note a wait and the line that caused it, and where that is of another library, the line that called it."""
        lines = [(frame.f_code.co_filename, number) for frame, number in traceback.walk_stack(None)]
        lines = [line for line in lines if line[0] != __file__ and not line[0].startswith(TORCH)]
        callers = [line for line in lines if line[0].startswith(PACKAGE)]
        places = [
            f"{file}:{number}: {linecache.getline(file, number).strip()}"
            for file, number in dict.fromkeys([lines[0], *callers[:1]])
        ]
        self.noted.append(f"{reason}: " + ", from ".join(places))

    def note_copy(self, source: Tensor, target: Tensor, non_blocking: bool) -> None:
        """Note a copy between the devices, if the host waits for it."""
        off = source if self.device(source) == CPU else target
        direct = source.dtype == target.dtype and source.is_contiguous() and target.is_contiguous()
        staged = off is source and target.nbytes <= SMALL
        if not (non_blocking and (staged or (direct and self.place(off) == "pinned"))):
            self.note("a copy from the CPU" if off is source else "a copy to the CPU")

    @contextmanager
    def waits(self, number: int) -> Iterator[None]:
        """Fail, naming the lines, unless the host waits exactly so often in this block."""
        before = len(self.noted)
        yield
        check(self.noted[before:], number)

    def group(self, lists: list, with_indices: bool = False, *, of_torch) -> dict:
        """Group tensors by device and dtype, as optimizers do, where the device is the emulated one."""
        groups = of_torch(lists, with_indices).items()
        return {(self.device(grouped[0][0][0]), dtype): grouped for (_, dtype), grouped in groups}


def check(noted: list[str], number: int) -> None:
    """Fail, naming the lines, unless so many waits were noted."""
    assert len(noted) == number, "\n".join([f"{len(noted)} waits instead of {number}:", *noted])


class Calls(TorchFunctionMode):
    """Sees every call of torch that Python makes: the device it names, and the generator it draws with."""

    def __init__(self, emulated: EmulatedDevice):
        super().__init__()
        self.emulated = emulated
        self.on_device = False
        """whether the call under way concerns tensors of the device, so that those it makes on its way are there too"""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, emulated = dict(kwargs or {}), self.emulated
        if function.__name__ == "__get__" or function in NAMES_ONLY:
            return emulated.device(args[0]) if function == Tensor.device.__get__ else function(*args, **kwargs)
        tensors = tensors_in((args, kwargs))
        if function in {Tensor.to, Tensor.cpu} or (function in FROM_DATA and isinstance(args[0], Tensor)):
            return self._move(function, args, kwargs)
        device = CUDA if any(emulated.device(tensor) == CUDA for tensor in tensors) else CPU
        if function in {Tensor.numpy, Tensor.__array__} and device == CUDA:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if function is Tensor.pin_memory:
            return emulated.put(args[0].clone(), "pinned")
        named = kwargs.get("device") is not None
        if named:
            device, kwargs["device"] = canonical(kwargs["device"]), CPU
        for leaf in leaves((args, kwargs)):
            if isinstance(leaf, torch._C.Generator) and leaf.device != device:
                raise RuntimeError(f"Expected a '{device.type}' device type for generator but found '{leaf.device}'")
        if device == CUDA and function in {*FROM_DATA, Tensor.new_tensor, Tensor.tolist}:
            emulated.note("numbers are read" if function is Tensor.tolist else "a copy from the CPU")
        outer, self.on_device = self.on_device, device == CUDA
        try:
            result = function(*args, **kwargs)
        finally:
            self.on_device = outer
        return emulated.put(result, device.type) if named or function is Tensor.__deepcopy__ else result

    def _move(self, function, args, kwargs):
        """Copy a tensor where it is not on the device that the call names, by itself or by another tensor of it."""
        emulated, tensor, rest = self.emulated, args[0], (*args[1:], *kwargs.values())
        source = emulated.device(tensor)
        named = [canonical(each) for each in rest if isinstance(each, (str, torch.device))]
        named += [emulated.device(each) for each in rest if isinstance(each, Tensor)]
        target = CPU if function is Tensor.cpu else (*named, source)[0]
        here = [CPU if isinstance(each, (str, torch.device)) else each for each in args]
        result = function(*here, **kwargs | ({"device": CPU} if kwargs.get("device") is not None else {}))
        if source == target:
            return result
        if result.untyped_storage()._cdata == tensor.untyped_storage()._cdata:
            result = result.clone()
        emulated.put(result, "cpu")
        non_blocking = next((each for each in args[1:] if isinstance(each, bool)), kwargs.get("non_blocking", False))
        emulated.note_copy(tensor, emulated.put(result, target.type), non_blocking)
        return result


class Kernels(TorchDispatchMode):
    """Sees every kernel, those of the backward pass too: the devices of its tensors, and whether the host waits."""

    def __init__(self, emulated: EmulatedDevice, calls: Calls):
        super().__init__()
        self.emulated, self.calls = emulated, calls

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, emulated = kwargs or {}, self.emulated
        tensors = tensors_in((args, kwargs))
        off = [tensor for tensor in tensors if emulated.device(tensor) == CPU]
        if len(off) == len(tensors):
            result = function(*args, **kwargs)
            return result if tensors or not self.calls.on_device else emulated.put(result, "cuda")
        if function is aten.copy_.default:
            if off:
                emulated.note_copy(args[1], args[0], args[2] if len(args) > 2 else False)
            return function(*args, **kwargs)
        if function in NOT_DETERMINISTIC and torch.are_deterministic_algorithms_enabled():
            raise RuntimeError(f"{function} does not have a deterministic implementation")
        if function in INDEXING:
            self._index(*args)
        else:
            scalars = all(tensor.ndim == 0 for tensor in off) and Tag.pointwise in function.tags
            writes_off = function._schema.is_mutable and any(tensor is args[0] for tensor in off)
            if off and (not scalars or writes_off):
                raise RuntimeError(f"Expected all tensors to be on the same device, but {function} got cuda:0 and cpu")
            if Tag.data_dependent_output in function.tags:
                emulated.note("a number is read")
            if Tag.dynamic_output_shape in function.tags:
                emulated.note("the size depends on numbers")
        return emulated.put(function(*args, **kwargs), "cuda")

    def _index(self, tensor: Tensor, indices: list[Tensor | None], value: Tensor | None = None, *accumulate) -> None:
        emulated, devices = self.emulated, [self.emulated.device(tensor)]
        if value is not None and value.ndim:
            devices.append(emulated.device(value))
        if CPU in devices:
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        for index in indices:
            if index is not None and emulated.device(index) == CPU:
                emulated.note("indices are copied from the CPU")
            elif index is not None and index.dtype == torch.bool and (value is None or value.ndim):
                emulated.note("the size depends on numbers")


@contextmanager
def emulated_device() -> Iterator[EmulatedDevice]:
    """Emulate a GPU in this block, for torch, for Accelerate and for this package."""
    emulated = EmulatedDevice()
    calls, group, autocast = Calls(emulated), torch._C._group_tensors_by_device_and_dtype, torch.autocast
    replaced = [
        (torch, "Generator", Generator),
        (torch, "autocast", lambda device_type, *args, **kwargs: autocast("cpu", *args, **kwargs)),
        (torch._C, "_group_tensors_by_device_and_dtype", lambda *args: emulated.group(*args, of_torch=group)),
        (torch.accelerator, "is_available", lambda: True),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "is_bf16_supported", lambda **kwargs: True),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "set_device", lambda device: None),
        (torch.cuda, "get_device_name", lambda device: "emulated GPU"),
    ]
    with ExitStack() as stack:
        for place in (patch.object(*each) for each in replaced):
            stack.enter_context(place)
        stack.enter_context(calls)
        stack.enter_context(Kernels(emulated, calls))
        yield emulated
