"""What the package asks of the machine: files, memory, worker processes, toolkits."""
