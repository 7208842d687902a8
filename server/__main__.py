import signal

if __name__ == "__main__":
    # Until somebody can read the policy again; it is read at start anyway. Before the imports, which take a second.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    from server.cli import main

    main()
