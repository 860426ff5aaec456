"""Chooses the replica that computes a prompt: pure code without I/O. Callers pass the current time."""

from services.gateway.routing.canary import Canary
from services.gateway.routing.prefix_index import Prompt
from services.gateway.routing.router import ReplicaLoad, Router
from services.gateway.routing.settings import RoutingSettings
