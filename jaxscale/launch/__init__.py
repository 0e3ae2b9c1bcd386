"""Starting and watching processes, and compiling for machines that are absent."""
