"""One thread for the tests' tiny tensors: more only wait for each other, longest on a busy machine."""

import torch

torch.set_num_threads(1)
