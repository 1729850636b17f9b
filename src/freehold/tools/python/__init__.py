"""placeholder"""

from freehold.tools.python.tool import PythonSession, PythonTool

__all__ = ["PythonSession", "PythonTool"]
