"""Both frameworks in one process, PyTorch on one thread: tests run two at a time."""

import torch

torch.set_num_threads(1)
