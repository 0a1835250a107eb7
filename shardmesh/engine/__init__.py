"""Computing: the only place that knows llama.cpp."""
