"""The decoder's operations on CPU in C++, compiled for this very machine at start-up. See docs/adr/0006-cpu-path.md."""
