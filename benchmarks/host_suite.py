"""What a call costs the host, begun on an idle device: in all, and how it divides."""

import argparse
from collections.abc import Callable, Iterator

import torch

from benchmarks.cases import COARSE_QUERIES
from benchmarks.chunk_suite import at_density
from benchmarks.server import Row, Server, dense_kernel, median_host_ms, warm_up
from benchmarks.timing import measure, synchronize
from rr_flex import CapturedPrefill, rr_attention

CALLS = ((2048, 2048), (8192, 8192), (32768, 32768), (512, 131072), (2048, 131072), (8192, 131072))  # queries, keys
# Names under which torch's profiler records what a compiled call does on the host.
GUARDS, GRAPH = "TorchDynamo Cache Lookup", "Torch-Compiled Region"
LAUNCHES = ("cuLaunchKernel", "cudaLaunchKernel", "cuLaunchKernelEx", "cudaLaunchKernelExC")


def rows(server: Server, options: argparse.Namespace) -> Iterator[Row]:
    inputs = server.inputs(1, server.length)
    config, _ = at_density(inputs, COARSE_QUERIES, 0.13)
    name, attend = dense_kernel(server.device)
    for queries, keys in CALLS:
        if keys > server.length:
            continue
        q, k, v = inputs.q[:, :, keys - queries : keys], inputs.k[:, :, :keys], inputs.v[:, :, :keys]
        ways = {
            backend: lambda _, backend=backend, qkv=(q, k, v): rr_attention(*qkv, config=config, backend=backend)
            for backend in server.backends
        } | {name: lambda _, qkv=(q, k, v): attend(*qkv)}
        if server.device.type == "cuda" and queries < keys:
            for backend in server.backends:
                graphs = CapturedPrefill(queries, config=config, backend=backend)
                cache = (inputs.k, inputs.v, keys - queries)
                ways[f"{backend}, graphs"] = lambda _, graphs=graphs, q=q, cache=cache: graphs(q, *cache)
        for way, call in ways.items():
            server.progress.step(f"{queries} of {keys}, {way}")
            warm_up(call, server.device)
            times = {"sets": 1, "device": server.device, "seconds": server.seconds, "repeats": (3, 20)}
            about = {"queries": queries, "keys": keys, "way": way}
            host = {"host_ms": median_host_ms(call, server.device), "ms": measure(call, **times).median}
            yield {"suite": "host", "failed": None, **about, **host, **parts(call, server.device), **server.about}


def parts(call: Callable[[int], object], device: torch.device) -> Row:
    """Milliseconds of guards, of the compiled graphs beside their launches, of launches, and launches' number, of one
    profiled call, which is slower than another: shares, not times."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:  # the first pays for its own start
        call(0)
        synchronize(device)
    with torch.profiler.profile(activities=activities) as profile:
        call(0)
        synchronize(device)
    guards = graph = launch = 0.0
    launches = 0
    for event in profile.events():
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue
        ms = event.cpu_time_total / 1000
        guards += ms * (event.name == GUARDS)
        graph += ms * event.name.startswith(GRAPH)
        launch += ms * (event.name in LAUNCHES)
        launches += event.name in LAUNCHES
    return {"guards_ms": guards, "graphs_ms": max(0.0, graph - launch), "launches_ms": launch, "launches": launches}
