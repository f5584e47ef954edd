"""What CUDA kernels share: headers, NVIDIA's runtime compiler, its driver, and a cache of kernels.

An operator's ``cuda.py`` declares its kernels (:class:`~.kernels.KernelSet`) and launches them.
They are compiled when they are first used, for the GPU that is there, by NVRTC, which comes with
PyTorch. Users need no CUDA toolkit, no C++ compiler, and no GPU to install.
"""
