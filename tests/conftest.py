import torch

torch.set_num_threads(1)  # the models are tiny: more threads would only wait for one another
