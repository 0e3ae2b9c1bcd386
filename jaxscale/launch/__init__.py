"""Starting processes, setting them up, watching them, and compiling for machines that are absent."""
