"""The names of models that are promised."""
VARIANTS = ('conv2d', 'conv2d_new', 'convnn', 'convnn_attn', 'convnn_branching', 'convnn_branching_attn')
BACKBONES = ('vgg11', 'vgg13', 'vgg16', 'vgg19', 'resnet18', 'resnet34')
ALL = [f'{backbone}_{variant}' for backbone in BACKBONES for variant in VARIANTS]
LARGE = [f'{backbone}_convnn_branching_224' for backbone in ('resnet18', 'resnet34', 'resnet50', 'vgg11')]
