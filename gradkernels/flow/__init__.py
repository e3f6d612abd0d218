"""How gradients travel, seen while a model trains: per time step, from inside the fused backward."""

from gradkernels.flow.alerts import Alert, FlowError, FlowWarning, Thresholds
from gradkernels.flow.monitor import Monitor, watch

__all__ = ["Alert", "FlowError", "FlowWarning", "Monitor", "Thresholds", "watch"]
