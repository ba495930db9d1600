"""Package metadata: name, version, dependencies and extras.

The ranges here are what the code is written for; ``constraints.txt`` holds the one exact set of
versions that was tested. Tool configuration (ruff, mypy, pytest) is in ``pyproject.toml``.
"""

from setuptools import find_packages, setup

DEPENDENCIES = [
    # training
    "torch>=2.11",
    "megatron-core==0.19.2",  # the first wheels with megatron.training; Python >= 3.12 only
    "nvidia-modelopt==0.47.*",
    "transformers>=5.17,<6",
    "safetensors",
    "tokenizers",
    # data
    "datasets",
    "jinja2>=3.1",
    "tiktoken",
    "numpy",
    "filelock>=4",  # leaves what is written in a lock file; forked processes do not hold it
    "pyarrow",
    # Megatron's checkpoint writer and ModelOpt import these without depending on them.
    "psutil",
    "requests",
    # configuration and output
    "pyyaml",
    "omegaconf>=2.3",
    "tqdm",
    "tensorboard",
]

EXTRAS = {
    "te": ["transformer-engine[pytorch]"],
    "dev": [
        "pytest",
        "pytest-xdist",
        "pytest-timeout",
        "hypothesis",
        "ruff",
        "mypy",
        "types-PyYAML",
    ],
    "bench": ["trl", "accelerate"],
    "lora": ["peft"],  # trains models of transformers, reads an exported adapter back
    "ray": ["ray>=2.40"],  # scripts/launch_ray.py
    "wandb": ["wandb"],
    # The client, and what it writes a local file with; the whole of MLflow wants an older pandas.
    "mlflow": ["mlflow-skinny>=3", "sqlalchemy", "alembic"],
}

setup(
    name="megatron-sft",
    version="0.1.0",
    description="Megatron-style supervised finetuning of language models",
    license="Apache-2.0",
    python_requires=">=3.12",
    # Naming the root as package directory makes an editable install one .pth line with the root
    # in it: new modules are seen without a reinstall, and type checkers can follow it.
    package_dir={"": "."},
    py_modules=["finetune", "model_provider"],
    packages=find_packages(include=["data", "data.*", "post_training", "post_training.*"]),
    install_requires=DEPENDENCIES,
    extras_require=EXTRAS,
)
