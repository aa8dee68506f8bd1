"""Generation: a prefill, a compiled decoding loop, and sampling."""
