"""The version of Headwater, where everything can read it; users see it as `headwater.__version__`."""

__version__ = "0.1.0"
