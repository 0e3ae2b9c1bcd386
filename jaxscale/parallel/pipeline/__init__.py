"""Pipeline parallelism: schedules as tables, and one engine that runs any of them."""
