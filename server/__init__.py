"""The gateway: HTTP requests with images in, classifications out, at the operating point that each request asks for.

routes -> upload -> gateway (decode -> engine -> backend) -> answer
          query -> policy (which operating point)
"""
