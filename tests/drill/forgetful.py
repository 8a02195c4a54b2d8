"""The drilled training with a fault, for tests of the drill: it resumes at batch 0."""

import program


class Drilled(program.Drilled):
    def after_restore(self):
        super().after_restore()
        self.trainer.reset_iterator(0)


if __name__ == "__main__":
    program.main(Drilled)
