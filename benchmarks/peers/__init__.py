"""The parts of benchmarks/cpu_peers.py: what others offer to run a ResNet on a CPU, and the processes that time it.

`others` has the contenders that `resnet-fast bench` lacks, `case` what is compared, `worker` a process that times one
case under one allocator, `jemalloc` the other allocator, `budget` how long all may take, `picture` the PNG.
"""
