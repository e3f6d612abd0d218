"""How gradients travel, seen while a model trains: per time step, from inside the fused backward."""

from gradkernels.flow import experiments, theory
from gradkernels.flow.alerts import Alert, FlowError, FlowWarning, Thresholds
from gradkernels.flow.compare import Comparison, compare
from gradkernels.flow.figures import heatmap, profile
from gradkernels.flow.jacobian import Jacobian, jacobian
from gradkernels.flow.log import DictLog, JsonlLog, TensorBoardLog
from gradkernels.flow.lyapunov import Lyapunov, lyapunov
from gradkernels.flow.monitor import Monitor, watch
from gradkernels.flow.report import report
from gradkernels.flow.serve import Server, serve
from gradkernels.flow.spectrum import Spectrum, spectrum
from gradkernels.flow.table import live, table

__all__ = [
    "Alert",
    "Comparison",
    "DictLog",
    "FlowError",
    "FlowWarning",
    "Jacobian",
    "JsonlLog",
    "Lyapunov",
    "Monitor",
    "Server",
    "Spectrum",
    "TensorBoardLog",
    "Thresholds",
    "compare",
    "experiments",
    "heatmap",
    "jacobian",
    "live",
    "lyapunov",
    "profile",
    "report",
    "serve",
    "spectrum",
    "table",
    "theory",
    "watch",
]
