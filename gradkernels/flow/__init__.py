"""How gradients travel, seen while a model trains: per time step, from inside the fused backward."""

from gradkernels.flow import experiments, theory
from gradkernels.flow.alerts import Alert, FlowError, FlowWarning, Thresholds
from gradkernels.flow.compare import Comparison, compare
from gradkernels.flow.jacobian import Jacobian, jacobian
from gradkernels.flow.lyapunov import Lyapunov, lyapunov
from gradkernels.flow.monitor import Monitor, watch
from gradkernels.flow.report import report
from gradkernels.flow.serve import Server, serve
from gradkernels.flow.spectrum import Spectrum, spectrum

__all__ = [
    "Alert",
    "Comparison",
    "FlowError",
    "FlowWarning",
    "Jacobian",
    "Lyapunov",
    "Monitor",
    "Server",
    "Spectrum",
    "Thresholds",
    "compare",
    "experiments",
    "jacobian",
    "lyapunov",
    "report",
    "serve",
    "spectrum",
    "theory",
    "watch",
]
