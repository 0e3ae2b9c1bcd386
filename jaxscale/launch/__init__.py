"""Starting, setting up and watching processes, and compiling for machines that are absent."""
