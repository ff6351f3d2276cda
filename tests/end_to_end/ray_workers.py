"""Workers for the tests of engine ray, in a module of their own, since other processes import them."""

import os
import signal
import sys
from pathlib import Path

from fisher_vmap.run import ray
from fisher_vmap.run.__main__ import main
from fisher_vmap.run.ray_worker import ShardWorker


class Throwing(ShardWorker):
    """Fails over the prompt of index 7."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        numbers = self.run.fisher.numbers
        poison = [prompt for prompt in self.run.prompts.of(7 // 3) if prompt.index == 7]
        ids = self.run.renderer.render(poison[0].messages_or_text).ids

        def careful(prompts_ids, rank):
            if any(one.ids == ids for sequences in prompts_ids for one in sequences):
                self.fail()
            return numbers(prompts_ids, rank)

        self.run.fisher.numbers = careful

    def fail(self):
        raise ArithmeticError("a prompt that nobody can compute")


class Dying(Throwing):
    """Its process is killed over the prompt of index 7, every time."""

    def fail(self):
        os.kill(os.getpid(), signal.SIGKILL)


class Unmakable(ShardWorker):
    """Cannot be made."""

    def __init__(self, *arguments):
        raise OSError("no model on this machine")


class Counting(ShardWorker):
    """Leaves a line in a file for each shard that it stores."""

    def __call__(self, numbers):
        there = {path.name for path in (self.run.writer.folder / "shards").glob("*.json")}
        accounts = super().__call__(numbers)
        with open(Path(os.environ["COUNTED"]), "a") as file:
            for number in numbers:
                if f"shard-{number:05d}.json" not in there:
                    file.write(f"{number}\n")
        return accounts


if __name__ == "__main__":
    import ray_workers  # by its name, as other processes know it

    ray.run_on_ray.__defaults__ = (getattr(ray_workers, sys.argv[1]),)
    sys.exit(main(sys.argv[2:]))
