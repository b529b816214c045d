"""Code of exported folders that load by themselves, and the functions that write it into an export."""
