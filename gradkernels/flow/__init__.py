"""How gradients travel, seen while a model trains: per time step, from inside the fused backward."""

from gradkernels.flow.alerts import Alert, FlowError, FlowWarning, Thresholds
from gradkernels.flow.monitor import Monitor, watch
from gradkernels.flow.report import report
from gradkernels.flow.serve import Server, serve

__all__ = ["Alert", "FlowError", "FlowWarning", "Monitor", "Server", "Thresholds", "report", "serve", "watch"]
