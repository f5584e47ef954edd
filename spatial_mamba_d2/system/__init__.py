"""What the package needs of the machine: files, memory, worker processes, Detectron2."""
