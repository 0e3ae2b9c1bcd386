"""Ray Serve as the distributed engine: replicas of `jaxscale serve`, each on devices of its own.

Ray starts them on its cluster's machines, restarts one that ends, and sends a request to the less
busy of two. Clients reach them as they reach one server.

python experiments/serving_ray.py runs/llama_1b --replicas 2
"""

import argparse
import sys


def main(words):
    from ray import serve

    options = parse(words)

    serve.start(http_options={"host": "127.0.0.1", "port": options.port})
    serve.run(deployment(options), name="jaxscale", blocking=True)


def deployment(options):
    """The application for `ray.serve.run`."""
    from ray import serve

    def build():
        """In each replica, which reads the run itself: only its directory's name is sent."""
        from jaxscale.run.model import opened
        from jaxscale.run.pipeline import make_engine
        from jaxscale.run.serve import make_service
        from jaxscale.serve.config import EngineConfig
        from jaxscale.serve.server import make_app

        service = make_service(opened(options.directory))
        config = EngineConfig(num_blocks=options.num_blocks)
        return make_app(lambda: make_engine(options.directory, config=config), service)

    replica = serve.deployment(
        num_replicas=options.replicas,
        max_ongoing_requests=512,
        health_check_period_s=10,
        ray_actor_options={"num_gpus": options.gpus},
    )
    return replica(serve.ingress(build)(type("Replica", (), {}))).bind()


def parse(words):
    """The options of the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=1, help="of each replica")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--num-blocks", type=int)
    return parser.parse_args(words)


if __name__ == "__main__":
    main(sys.argv[1:])
