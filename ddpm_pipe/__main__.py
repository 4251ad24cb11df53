"""`python -m ddpm_pipe` and `accelerate launch -m ddpm_pipe` run the same commands as `ddpm-pipe`."""

from ddpm_pipe.cli import main

main()
