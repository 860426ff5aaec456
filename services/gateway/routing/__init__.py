"""Chooses the replica that computes a prompt: pure code, without I/O and without a clock of its own."""

from services.gateway.routing.router import ReplicaLoad, Router
from services.gateway.routing.settings import RoutingSettings
