"""Where the package's folders lie; everything else about it is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["spatial_mamba_d2", "spatial_mamba_d2.*"]),
        "spatial_mamba_d2.ops",
        *(f"spatial_mamba_d2.ops.{name}" for name in find_packages("ops")),
        "spatial_mamba_d2.configs",
    ],
    package_dir={"spatial_mamba_d2.ops": "ops", "spatial_mamba_d2.configs": "configs"},
)
