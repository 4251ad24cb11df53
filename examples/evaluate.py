"""Measure a model: `accelerate launch examples/evaluate.py --model runs/mine/pipeline --data path [--key value]`."""

from ddpm_pipe.config import main
from ddpm_pipe.evaluation.evaluate import EvaluateConfig, evaluate

if __name__ == "__main__":
    main(evaluate, EvaluateConfig)
