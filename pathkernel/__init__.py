"""A network trained by gradient descent is a kernel machine; this library makes that true in practice."""

from pathkernel.attributions import Attributions as Attributions
from pathkernel.kernel_machine import KernelMachine as KernelMachine
from pathkernel.path_kernel import PathKernel as PathKernel
from pathkernel.quadrature import Adaptive as Adaptive
from pathkernel.quadrature import DiscreteGradient as DiscreteGradient
from pathkernel.quadrature import GaussLegendre as GaussLegendre
from pathkernel.quadrature import LeftEndpoint as LeftEndpoint
from pathkernel.quadrature import Midpoint as Midpoint
from pathkernel.quadrature import Trapezoid as Trapezoid
from pathkernel.recording.indexed import IndexedDataset as IndexedDataset
from pathkernel.recording.recorder import KernelRecorder as KernelRecorder
from pathkernel.tangent_kernel.tangent_kernel import TangentKernel as TangentKernel
from pathkernel.trajectory.trajectory import Trajectory as Trajectory
from pathkernel.update_rules.rule import UpdateRule as UpdateRule

__version__ = "0.1.0"
