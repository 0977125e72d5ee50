"""moelib: what MoE CPU offloading buys and costs, measured so that it survives an audit."""

__version__ = "0.1.0"
