"""Build or load a package's engine on this machine's GPU; print how near it is to single precision, and how fast.

    occbev verify-engine occbev-tiny
    occbev verify-engine out/package --cameras 5 --device 1 --markdown docs/benchmarks.md
    occbev verify-engine out/package --backend onnxruntime --provider cuda

Its outputs are compared with those of ONNX Runtime on the CPU. The first run of TensorRT builds the engine, which takes
minutes. Exit status 1 where an output is further off than fp16 and int8 make it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from occbev.benchmarks import Report
from occbev.benchmarks.markdown import write_section
from occbev.inference.backend import PROVIDERS, RUNTIMES, RunSettings
from occbev.inference.model_package import ModelPackage, find_package
from occbev.inference.verify import LIMITS, Verification, verify


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("package", help="model package, by name or folder")
    parser.add_argument("--backend", default="tensorrt", choices=sorted(RUNTIMES), help="runtime (default: tensorrt)")
    parser.add_argument("--cameras", type=int, default=6, help="cameras of the rig (default: 6)")
    parser.add_argument("--precision", default="auto", choices=("auto", "f32"), help="f32 forbids fp16, tf32 and int8")
    parser.add_argument("--device", type=int, default=0, help="CUDA index of the GPU (default: 0)")
    parser.add_argument("--provider", default="auto", choices=PROVIDERS, help="of ONNX Runtime (default: auto)")
    parser.add_argument("--rounds", type=int, default=50, help="timed runs (default: 50)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write the result into its section of FILE: docs/benchmarks.md"
    )


def run(args: argparse.Namespace) -> int:
    """Verify one package; 1 if it is too far off."""
    if args.rounds < 1 or args.cameras < 1:
        raise ValueError(f"--rounds {args.rounds} --cameras {args.cameras}: both at least 1")
    package = ModelPackage.load(find_package(args.package))
    settings = RunSettings(precision=args.precision, device=args.device, provider=args.provider)
    found = verify(package, args.backend, settings, args.cameras, args.rounds)
    record = _as_report(args, package, found).as_record()
    print(json.dumps(record, indent=2) if args.json else _describe(package, found))
    if args.markdown is not None:
        command = f"occbev verify-engine {args.package} --backend {args.backend} --precision {args.precision}"
        write_section(args.markdown, record, command)
    problems = found.problems(LIMITS[args.precision])
    for problem in problems:
        print(f"occbev verify-engine: {package.model.name} on {found.device}: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _as_report(args: argparse.Namespace, package: ModelPackage, found: Verification) -> Report:
    values = {
        "device": found.device,
        "cameras": found.cameras,
        "latency_ms": round(found.latency_ms, 3),
        "p95_ms": round(found.p95_ms, 3),
        "rounds": found.rounds,
        "difference": {name: float(f"{value:.2g}") for name, value in found.differences.items()},
    }
    return Report(f"verify-engine {package.model.name} {args.backend} {args.precision}", values)


def _describe(package: ModelPackage, found: Verification) -> str:
    lines = [
        f"{package.model.name} on {found.device}, {found.cameras} cameras",
        f"latency {found.latency_ms:.2f} ms, 95th percentile {found.p95_ms:.2f} ms, of {found.rounds} runs with copies",
        *(f"{name}: differs by {value:.1e} of its largest value" for name, value in found.differences.items()),
    ]
    return "\n".join(lines)
