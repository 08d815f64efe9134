"""Small tensors are fastest in one thread, and the suite runs several processes."""

import torch

torch.set_num_threads(1)
