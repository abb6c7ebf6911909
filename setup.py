"""Installs cacovid_jax: `pip install -e .`, extras as in the README."""

import pathlib
import re

import setuptools

_ROOT = pathlib.Path(__file__).parent
_VERSION = re.search(
  r'__version__ = "(.+)"', (_ROOT / "cacovid_jax" / "__init__.py").read_text()
).group(1)
_README = _ROOT / "README.md"

# Newer JAX needs Python 3.12, and Flax up to 0.12.8 fails with it.
_JAX = {
  'python_version < "3.12"': (">=0.10.2,<0.11", ">=0.12.8"),
  'python_version >= "3.12"': (">=0.11", ">=0.12.10"),
}


def _jax(extra):
  return [f"jax{extra}{jax}; {python}" for python, (jax, _) in _JAX.items()]


setuptools.setup(
  name="cacovid_jax",
  version=_VERSION,
  description="Contribution-aware token compression for video LLMs, in JAX",
  long_description=_README.read_text("utf-8") if _README.exists() else "",
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  packages=setuptools.find_packages(include=["cacovid_jax", "cacovid_jax.*"]),
  package_data={
    "cacovid_jax": [
      "assets/**/*",
      "evals/report/templates/**/*",
      "integrations/lmms_eval/tasks/**/*.yaml",
    ]
  },
  # Read by `python -m lmms_eval --model cacovid_jax`.
  entry_points={
    "lmms_eval.models": [
      "cacovid_jax = cacovid_jax.integrations.lmms_eval.manifest:manifest"
    ]
  },
  python_requires=">=3.11",
  install_requires=[
    *_jax(""),
    *(f"flax{flax}; {python}" for python, (_, flax) in _JAX.items()),
    "absl-py>=2.1",
    "av>=15",  # lmms-eval holds PyAV below 16; 18 works as well.
    "chex>=0.1.90",
    "grain>=0.2.15",
    "jinja2>=3.1",
    "matplotlib>=3.9",
    "ml-collections>=1.0",
    "msgspec>=0.19",
    "nltk>=3.9",
    "numpy>=2.0",
    "optax>=0.2.7",
    "orbax-checkpoint>=0.11.25",
    "pillow>=11",
    "pyarrow>=18",
    "regex>=2024.5.15",
    "rich>=13",
    "rouge-score>=0.1.2",
    "safetensors>=0.5",
    "scipy>=1.14",
    "tensorboardX>=2.6",
    "tensorflow-datasets>=4.9.9",  # Used without TensorFlow.
    "tokenizers>=0.21",
  ],
  extras_require={
    "cuda12": _jax("[cuda12]"),
    "cuda13": _jax("[cuda13]"),
    "tpu": _jax("[tpu]"),
    "wandb": ["wandb>=0.19"],
    "gcs": ["gcsfs>=2025.2"],  # Workdirs on gs://.
    "hf": ["torch>=2.6", "transformers>=5"],
    # Brings torch, and PyAV below 16.
    # It patches a module that filelock 4 does not have any more.
    "lmms": ["lmms-eval>=0.7.3,<0.8", "filelock<4"],
    "docs": ["furo>=2025.7", "myst-nb>=1.3", "sphinx>=8.2"],
    "dev": [
      "wandb>=0.19",
      "fsspec>=2025.2",
      "import-linter>=2.1",
      "ipykernel>=6",
      "nbclient>=0.10",
      "networkx>=3.2",
      "pytest>=8",
      "pytest-xdist>=3.8",
      "ruff==0.17.6",
      "scikit-learn>=1.5",
      "selenium>=4.20",  # make browser-test
    ],
  },
  classifiers=[
    "License :: OSI Approved :: Apache Software License",
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
  ],
)
