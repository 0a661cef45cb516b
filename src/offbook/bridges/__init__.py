"""Policy servers that others wrote, as policies: openpi's and RoboArena's websocket servers, LeRobot's gRPC server."""
