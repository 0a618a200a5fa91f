"""One module a backend: allocate, launch, nothing else. The signatures are those of `resnet_fast.ops`."""
