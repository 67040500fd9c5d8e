"""What the GPU kernels cost, told without a GPU: registers by ptxas, and bytes and launches by counting."""
