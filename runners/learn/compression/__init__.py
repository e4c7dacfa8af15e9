"""What training compressors needs beside the training itself: rows of text, the comparison, its figure."""
