from lumina.config import Config
def get_config(variant=""):
    return Config()
