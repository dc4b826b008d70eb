"""On-disk formats that several ops read or write: tensor names, kernels, config entries."""
