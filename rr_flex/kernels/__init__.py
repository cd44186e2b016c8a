"""What attends over the kept blocks: one module a kernel, and which of them a call takes."""
