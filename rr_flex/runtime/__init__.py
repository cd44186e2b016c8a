"""What depends on torch's private parts, on memory and on files; no step of the method."""
