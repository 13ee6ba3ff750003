"""The CPU kernels and their stages as a program without PyTorch, for processors that PyTorch is not at hand for."""
