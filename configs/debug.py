from lumina.config import *
def get_config(variant=""):
    c=Config(model=ModelConfig(d_ff=608,moe=MoEConfig(pattern="all"),mod=MoDConfig(pattern="all",capacity=.5625)))
    c.train.steps=300; c.optim.learning_rate=4e-3
    return c
