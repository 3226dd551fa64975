"""Records that ship with the package, a folder for each instruction set: see README.md."""
