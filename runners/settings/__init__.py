"""What was typed: its checks, its errors in one line each, and the objects that it names."""
