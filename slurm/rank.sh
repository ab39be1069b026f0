# Runs each process under torchrun's agent, which restarts all ranks whatever the exit code of one was. What
# must not be restarted is noted for common.sh instead: 2, an error of the user's; 75, stopped by a signal.
# A rank dies with its agent: one that lived on would write into the run that has been started again.
[ ! -e "$SFTRL_LAUNCH_LOGS/refused" ] || exit 2
setpriv --pdeathsig KILL "$SFTRL_LAUNCH_PYTHON" "$@"
code=$?
case $code in
  2) touch "$SFTRL_LAUNCH_LOGS/refused" ;;
  75) touch "$SFTRL_LAUNCH_LOGS/stopped"; exit 0 ;;
esac
exit $code
