"""Compiles FlashInfer's decoding kernel for Hopper, in bfloat16 with heads of 128, without a GPU.

It fills FlashInfer's own templates as its `gen_batch_decode_module` does, which would need PyTorch
and a GPU. SITE is where the wheels of flashinfer-python, apache-tvm-ffi and jax-tvm-ffi are
unpacked.

python experiments/bench/flashinfer_build.py SITE LIBRARY.so
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jinja2

TYPES = dict.fromkeys(("dtype_q", "dtype_kv", "dtype_o"), "nv_bfloat16") | {"idtype": "int32_t"}
HEADS = dict.fromkeys(("head_dim_qk", "head_dim_vo"), 128)
SCALARS = ("logits_soft_cap", "sm_scale", "rope_rcp_scale", "rope_rcp_theta")
SLOPES = "maybe_alibi_slopes"
SETTINGS = (
    TYPES
    | HEADS
    | dict.fromkeys(("use_sliding_window", "use_logits_soft_cap"), "false")
    | {
        "pos_encoding_mode": "PosEncodingMode::kNone",
        "variant_name": "DefaultAttention<false, false, false, false>",
        "variant_decl": "#include<flashinfer/attention/variants.cuh>",
        "additional_params_decl": "".join(
            [f"float* {SLOPES};\n", *(f"double {name};\n" for name in SCALARS)]
        ),
        "additional_func_params": "".join(
            [f", Optional<ffi::Tensor> {SLOPES}", *(f", double {name}" for name in SCALARS)]
        ),
        "additional_params_setter": " \\\n".join(
            [f"params.{SLOPES} = nullptr;", *(f"params.{name} = {name};" for name in SCALARS)]
        ),
    }
)
FLAGS = "-std=c++17 -O3 --use_fast_math -static-global-template-stub=false -shared -Xcompiler -fPIC"
TARGET = "-gencode arch=compute_90a,code=sm_90a -DFLASHINFER_ENABLE_BF16 -DFLASHINFER_ENABLE_F16"
FLOAT8 = "-DFLASHINFER_ENABLE_FP8_E4M3 -DFLASHINFER_ENABLE_FP8_E5M2 -DNDEBUG"
INCLUDED = (
    *(f"flashinfer/data/cccl/{name}" for name in ("libcudacxx/include", "cub", "thrust")),
    *(f"flashinfer/data/{name}" for name in ("include", "csrc", "spdlog/include")),
    "tvm_ffi/include",
)


def main():
    site, library = map(Path, sys.argv[1:])
    source = site / "flashinfer" / "data" / "csrc"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for template, file in (
            ("batch_decode_customize_config.jinja", "batch_decode_config.inc"),
            ("batch_decode_kernel_inst.jinja", "batch_decode_kernel.cu"),
        ):
            text = jinja2.Template((source / template).read_text()).render(SETTINGS)
            (folder / file).write_text(text)
        for file in ("batch_decode.cu", "batch_decode_jit_binding.cu"):
            shutil.copy(source / file, folder)
        flags = [*f"{FLAGS} {TARGET} {FLOAT8}".split(), "-I", folder]
        for include in INCLUDED:
            flags += ["-I", site / include]
        linked = ["-L", site / "tvm_ffi" / "lib", "-ltvm_ffi"]
        subprocess.run(["nvcc", *flags, *folder.glob("*.cu"), *linked, "-o", library], check=True)


if __name__ == "__main__":
    main()
