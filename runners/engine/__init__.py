"""The engine: from examples to answers over a compressed cache, alone and with a shared prefill."""
